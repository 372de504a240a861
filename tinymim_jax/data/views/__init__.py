"""From encoded bytes to the pixels of a view: decoding, crops, RandAugment."""
