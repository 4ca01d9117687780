"""The generative story: priors, decoder, likelihood, and the linear-Gaussian oracle."""
