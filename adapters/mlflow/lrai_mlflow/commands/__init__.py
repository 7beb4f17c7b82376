"""What a person does: save and log, convert, deploy; and `lrai mlflow`. Serving imports none."""
