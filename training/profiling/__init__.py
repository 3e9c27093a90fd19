"""How fast a run trains and how much memory it takes: measured in its log, and forecast before weights are read."""
