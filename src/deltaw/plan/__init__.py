"""What a run needs in memory, by cause, before it is started; and what fits."""
