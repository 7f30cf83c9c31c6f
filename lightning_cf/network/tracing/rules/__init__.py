"""What each kind of tensor operation does to units, one file a kind; ``call`` is what a rule gets to see."""
