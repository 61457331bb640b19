"""A sweep as one object: which runs it has and how each stands, several at a time, each in a process of its own."""
