-- Takes back all of a job's losses, on an operator's word: if it is isolated, it goes to the front of its queue.
-- ARGV: two prefixes, id.
-- Returns the job's state, or false for an unknown job.
local id = ARGV[3]
local job = read_sound(id)
if not job then return false end
if job.losses then set_fields(id, {losses = ''}) end
if redis.call('ZREM', k_isolated(job.queue), id) == 1 and job.state == 'queued' then
  requeue(id, job.queue, '', job.epoch)
end
return answer(job.state)
