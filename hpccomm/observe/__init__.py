"""See a machine and a job: what is missing here (doctor), what a job did and who waited for whom (timeline, report)."""
