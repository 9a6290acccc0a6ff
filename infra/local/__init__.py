"""The stack of one machine: MLflow's server on PostgreSQL, its files and those of `publish.store` in an S3 server."""
