"""The world of the embedded model: drawn landscapes with captions, and a judge of pictures of them."""
