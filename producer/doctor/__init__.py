"""What `nightherd doctor` checks without torch."""
