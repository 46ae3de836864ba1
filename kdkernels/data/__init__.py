"""Convert rows of text to batches. An example has a student's view and a teacher's view of one response."""
