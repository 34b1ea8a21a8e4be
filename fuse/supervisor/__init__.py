"""What must outlive a crash: descriptors, and who starts the agent again. Standard library only."""
