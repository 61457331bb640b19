"""What came out of a run: its folder, its result, its mirrors."""
