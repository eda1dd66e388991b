"""What a generation costs, the dense one that costs the same, and settings for a wanted speed."""
