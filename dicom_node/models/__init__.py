"""Model packages and the process that runs them; the only importer of torch and monai beside demo.train."""
