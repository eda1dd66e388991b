"""The world of the embedded model: captioned landscapes, drawn, and a judge of pictures of them."""
