"""The compile gate and the traffic counter: what can be known of kernels without a GPU."""
