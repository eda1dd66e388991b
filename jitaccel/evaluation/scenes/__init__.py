"""The small world of the embedded model: captioned scenes of textured shapes, and a judge of pictures of them."""
