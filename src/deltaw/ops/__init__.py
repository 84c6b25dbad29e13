"""Operations: each one a plain-PyTorch reference, and faster implementations compared with it."""
