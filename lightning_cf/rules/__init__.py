"""What each kind of tensor operation does to units."""
