-- Cancels a job: at once if queued; a running one is flagged and its worker told. Idempotent.
-- ARGV: two prefixes, id, iso (the wall clock's time in RQ's form), reason.
-- Returns the state after the call, or false for an unknown job.
local id, iso, reason = ARGV[3], ARGV[4], ARGV[5]
if not is_hash(k_job(id)) then return false end
local job = read_fields(id, field_list('state', 'queue', 'owner', 'cancel_reason'))
if not is_sound(id) then
  bury(id, job.queue or '', iso, now_ms())
  return answer('failed')
end
if TERMINAL[job.state] then return answer(job.state) end
if job.state == 'queued' then
  if redis.pcall('ZREM', k_isolated(job.queue), id) ~= 1 then  -- what is isolated is on no list
    redis.call('LREM', k_rq_queue(job.queue), 1, id)  -- a producer may not read the index, so not `take_off_list`
  end
  return answer(finalize_cancelled(id, job.queue, reason, iso, now_ms()))
end
if job.cancel_reason == '' then set_fields(id, {cancel_reason = reason}) end
redis.call('PUBLISH', k_control(job.owner), 'cancel ' .. id)
return answer(job.state)
