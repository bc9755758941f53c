-- Takes over jobs whose lease ran out, uncharged (a lost lease says nothing of the job: see crash.lua), and expires queued jobs past their deadline. Any worker may run it.
-- ARGV: P R iso lease_ms most queue … (the caller's own, whether or not RQ's set of queues still names them).
-- Returns {waited 0|1, {{id, outcome} …}};
-- outcome: 'requeued', 'cancelled', 'expired'.
local iso, lease, most = ARGV[3], tonumber(ARGV[4]), tonumber(ARGV[5])
-- After a restart live workers need one lease to renew; until then an old deadline proves nothing.
local uptime = tonumber(string.match(redis.call('INFO', 'server'), 'uptime_in_seconds:(%d+)'))
if uptime * 1000 < lease + 2000 then return {1, {}} end

local now = now_ms()
local done = {}
local head = string.len(k_rq_queue('')) + 1
local queues = {}
for i = 6, #ARGV do queues[ARGV[i]] = true end
if redis.call('TYPE', k_rq_queues()).ok == 'set' then
  for _, name in ipairs(redis.call('SMEMBERS', k_rq_queues())) do queues[string.sub(name, head)] = true end
end

local function take_over(id, queue)
  if not is_sound(id) then bury(id, queue, iso, now) return end
  local c = redis.call('HMGET', k_job(id), 'st', 'ep', 'ow', 'ca')
  if c[1] ~= 'running' then redis.call('ZREM', k_leases(queue), id) return end
  local outcome
  if c[4] ~= '' then
    outcome = state_for(c[4])
    finalize_unowned(id, queue, outcome, outcome == 'expired' and c[4] or 'cancelled', c[4], iso, now)
  else
    outcome = 'requeued'
    requeue(id, queue, c[3], c[2])
  end
  done[#done + 1] = {id, outcome}
end

for queue in pairs(queues) do
  for _, id in ipairs(redis.pcall('ZRANGEBYSCORE', k_leases(queue), '-inf', now, 'LIMIT', 0, most)) do take_over(id, queue) end
end

for _, id in ipairs(redis.pcall('ZRANGEBYSCORE', k_deadlines(), '-inf', now, 'LIMIT', 0, most)) do
  local c = is_sound(id) and redis.call('HMGET', k_job(id), 'st', 'q', 'ow', 'ca') or {}
  if c[1] == 'queued' then
    redis.call('LREM', k_rq_queue(c[2]), 1, id)
    finalize_unowned(id, c[2], 'expired', 'deadline_exceeded', 'the deadline passed while the job was queued', iso, now)
    done[#done + 1] = {id, 'expired'}
  else
    redis.call('ZREM', k_deadlines(), id)
    if c[1] == 'running' then
      if c[4] == '' then redis.call('HSET', k_job(id), 'ca', 'deadline_exceeded') end
      redis.call('PUBLISH', k_control(c[3]), 'cancel ' .. id)
    end
  end
end
-- RQ's own workers trim these; a fleet of ours alone has nobody else to.
for i = 6, #ARGV do
  for _, registry in ipairs({k_rq_finished, k_rq_failed, k_rq_canceled}) do
    show(redis.call, 'ZREMRANGEBYSCORE', registry(ARGV[i]), '-inf', '(' .. int(math.floor(now / 1000)))
  end
end
return {0, done}
