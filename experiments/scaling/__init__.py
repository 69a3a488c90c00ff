"""The ladder of sizes."""
