"""What judges generated pictures: the drawn world and its judge."""
