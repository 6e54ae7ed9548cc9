"""Models. No rank, group or collective is chosen here: axes come in as arguments and go on to the layers."""
