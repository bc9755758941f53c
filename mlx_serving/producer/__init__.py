"""What a web backend imports: clients that submit jobs and follow them. Never imports `worker`."""
