-- Repairs open jobs that neither the list nor a lease holds. The caller found the candidates; each is checked again here.
-- ARGV: two prefixes, iso (the wall clock's time in RQ's form), queue, lease_ms, then ids.
-- Returns for each job that was repaired: id, outcome (requeued | cancelled | leased | closed).
local iso, queue, lease = ARGV[3], ARGV[4], tonumber(ARGV[5])
local FIRST_JOB = 6
local now = now_ms()
local done = {}
local list = k_rq_queue(queue)

local function repair(id)
  local job = read_sound(id)
  if not job then
    redis.call('LREM', list, 0, id)
    bury(id, queue, iso, now)
    return 'closed'
  end
  if TERMINAL[job.state] or job.queue ~= queue then redis.call('ZREM', k_open(queue), id) return 'closed' end
  if job.state == 'running' then
    if redis.call('ZSCORE', k_leases(queue), id) then return nil end
    redis.call('ZADD', k_leases(queue), int(now + lease), id)
    return 'leased'
  end
  local verdict = stock_verdict(id)
  if verdict ~= '' then
    redis.call('LREM', list, 0, id)
    finalize_unowned(id, queue, 'cancelled', 'cancelled', 'the RQ job was ' .. verdict, iso, now)
    return 'cancelled'
  end
  if redis.call('ZSCORE', k_isolated(queue), id) or redis.call('LPOS', list, id) then return nil end
  redis.call('LPUSH', list, id)
  redis.call('SADD', k_rq_queues(), list)
  redis.call('PUBLISH', k_wake(queue), id)
  return 'requeued'
end

for at = FIRST_JOB, #ARGV do
  local outcome = repair(ARGV[at])
  if outcome then done[#done + 1] = {ARGV[at], outcome} end
end
return answer(done)
