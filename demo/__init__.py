"""The demo's two tiny trained Gemma 4 checkpoints: tasks, training, scoring. Not part of the installed package."""
