"""The laboratory: many trials in one program, and tables and pictures of their results."""
