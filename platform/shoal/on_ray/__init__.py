"""The only place that imports ray: prepare on Ray Data, train on Ray Train, serve on Ray Serve."""
