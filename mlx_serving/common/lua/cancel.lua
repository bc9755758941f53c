-- Cancels a job: at once if queued; a running one is flagged and its worker told. Idempotent.
-- ARGV: P R id iso reason. Returns the state after the call, or false for an unknown job.
local id, iso, reason = ARGV[3], ARGV[4], ARGV[5]
if not is_hash(k_job(id)) then return false end
local c = redis.call('HMGET', k_job(id), 'st', 'q', 'ow', 'ca')
if not is_sound(id) then
  bury(id, c[2] or '', iso, now_ms())
  return 'failed'
end
if TERMINAL[c[1]] then return c[1] end
if c[1] == 'queued' then
  redis.call('LREM', k_rq_queue(c[2]), 1, id)
  local state = state_for(reason)
  finalize_unowned(id, c[2], state, state == 'expired' and reason or 'cancelled', reason, iso, now_ms())
  return state
end
if c[4] == '' then redis.call('HSET', k_job(id), 'ca', reason) end
redis.call('PUBLISH', k_control(c[3]), 'cancel ' .. id)
return c[1]
