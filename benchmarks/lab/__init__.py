"""What each part of the method is worth: variants that the product does not have, sampled on the embedded model."""
