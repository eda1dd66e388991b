"""How good pictures are, and how sure that is: metrics of pictures, intervals and paired tests. Knows no model."""
