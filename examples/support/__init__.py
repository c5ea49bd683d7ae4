"""What the examples share: other people's packages as data, loaders, nets, training, tables of results."""
