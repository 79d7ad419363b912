"""Plain-torch implementations: leaner than autograd would be, on any device, chosen by
``koffkernels.dispatch``."""
