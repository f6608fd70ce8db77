"""The parts of the loss head: the list of states, the blocks of the vocabulary, the backends that make the tiles."""
