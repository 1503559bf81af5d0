"""One HTML file that shows runs: settings, curves, drift by position, cost, responses with the drift of each token."""
