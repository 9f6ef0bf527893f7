"""Many runs, one table: resumable jobs, what they measured, and a page that shows it."""
