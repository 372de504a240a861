"""What a trained network does: similarity of layers, attention, relations, accuracy of each block, single steps."""
