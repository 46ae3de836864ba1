"""From rows of text to batches: examples of a student's view and a teacher's view of one response."""
