"""`loopfm study`: the paper's tables, each cell run once, beside the paper's numbers."""
