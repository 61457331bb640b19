"""What is done with a finished run: asked, merged into a plain checkpoint, exported to PEFT."""
