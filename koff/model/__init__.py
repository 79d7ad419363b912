"""What is inside an attached model: gates, memories, attention over a learned prefix."""
