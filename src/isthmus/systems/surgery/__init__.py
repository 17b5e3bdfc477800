"""Systems that change trained models, one file each."""
