"""`lrai sagemaker check`."""
