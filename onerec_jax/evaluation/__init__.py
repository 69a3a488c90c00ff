"""Full-ranking evaluation, bootstrap, report page."""
