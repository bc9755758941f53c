-- Deletes jobs that ended, with all that Redis holds of them. A job that is gone already is as good as deleted.
-- ARGV: two prefixes, then ids.
-- Returns for each job: its state if it has not ended and stays; else ''.
local FIRST_JOB = 3
local READ = field_list('state', 'queue')
local replies = {}
shared, shown = gather, gather_view

-- Whether RQ's own enqueue put the job there, and no worker has claimed it yet. A producer may not read RQ's hashes, but
-- how long a value is: of RQ's states only 'failed' is as long as 'queued', and that has an end.
local function is_waiting(id)
  local key = k_rq_job(id)
  if not is_hash(key) then return false end
  return redis.call('HSTRLEN', key, 'status') == #'queued' and redis.call('HSTRLEN', key, 'ended_at') == 0
end

local function forget(id)
  local job = find_fields(id, READ)
  if OPEN[job.state] then return job.state end
  if not job.state and is_waiting(id) then return 'queued' end
  shared('DEL', k_job(id), k_events(id))
  shared('DEL', k_rq_job(id), k_rq_results(id))
  if job.queue then
    for _, registry in pairs(REGISTRIES) do shown('ZREM', registry(job.queue), id) end
  end
  return ''
end

for at = FIRST_JOB, #ARGV do replies[#replies + 1] = forget(ARGV[at]) end
write_gathered()
return answer(replies)
