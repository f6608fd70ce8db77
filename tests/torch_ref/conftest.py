"""One thread: models this small gain nothing from more, and beside other tests lose a hundredfold."""

import torch

torch.set_num_threads(1)
