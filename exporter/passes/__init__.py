"""Graph to graph: each pass is one file with one class, and says whether it changed anything."""
