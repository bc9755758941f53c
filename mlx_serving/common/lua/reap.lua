-- Takes over jobs whose lease ran out (what that says of a job: losses.lua), judges those that are isolated, and expires
-- queued jobs past their deadline, or past the time in which somebody should have taken them. Trims RQ's registries. Any worker
-- may run it, for all queues.
-- ARGV: two prefixes, iso (the wall clock's time in RQ's form), lease_ms, most (jobs of each kind and queue), machine of the
--   caller ('': none that runs jobs), then queues: the caller's own, looked at whether or not RQ's set of queues still names them.
-- Returns waited (0|1: Redis restarted too lately to reap), and for each job: id, outcome (requeued | isolated | dead |
--   cancelled | expired).
local iso, lease, most, machine = ARGV[3], tonumber(ARGV[4]), tonumber(ARGV[5]), ARGV[6]
local FIRST_QUEUE = 7
local TAKEN_OVER = field_list('state', 'epoch', 'cancel_reason', unpack(LOSSES.READ))
local OVERDUE = field_list('state', 'queue', 'owner', 'cancel_reason', 'deadline_ms', 'queued_ttl')
local JUDGED = 8  -- isolated jobs of a queue that a call looks at: any of them, so that each has its turn
local TRIMMED, TIDIED = 1000, 16  -- at most: entries of RQ's registries that a call removes, and others' queues that it looks at
-- After a restart live workers need one lease to renew; until then an old deadline proves nothing.
local uptime = tonumber(string.match(redis.call('INFO', 'server'), 'uptime_in_seconds:(%d+)'))
if uptime * 1000 < lease + 2000 then return answer({1, {}}) end

local now = now_ms()
local done = {}
local LANES = {interactive = true, default = true, bulk = true}
local head = string.len(k_rq_queue('')) + 1
local own, queues = {}, {}
for at = FIRST_QUEUE, #ARGV do own[ARGV[at]], queues[ARGV[at]] = true, true end
for _, name in ipairs(redis.pcall('SMEMBERS', k_rq_queues())) do queues[string.sub(name, head)] = true end

local function take_over(id, queue)
  if not is_sound(id) then bury(id, queue, iso, now) return end
  local job = read_fields(id, TAKEN_OVER)
  if job.state ~= 'running' or job.queue ~= queue then redis.call('ZREM', k_leases(queue), id) return end
  local outcome = end_cancelled(id, job, iso, now) or 'requeued'
  if outcome == 'requeued' then
    local isolated = LOSSES.note(id, job, now, lease)
    requeue(id, queue, job.owner, job.epoch)
    if isolated then
      LOSSES.isolate(id, job, now)
      outcome = 'isolated'
    end
  end
  done[#done + 1] = {id, outcome}
end

-- Looks at a job that was isolated: its workers may have come back since, or another machine may be there.
local function judge(id, queue)
  local job = read_sound(id)
  if not job then bury(id, queue, iso, now) end
  if not job or job.state ~= 'queued' or job.queue ~= queue then redis.call('ZREM', k_isolated(queue), id) return end
  local outcome, why = end_cancelled(id, job, iso, now), nil
  if not outcome then outcome, why = LOSSES.judge(id, job, machine, now, lease) end
  if outcome == 'dead' then finalize_unowned(id, queue, 'dead', 'poison', why, iso, now)
  elseif outcome == 'requeued' then
    redis.call('ZREM', k_isolated(queue), id)
    requeue(id, queue, '', job.epoch)
  end
  if outcome then done[#done + 1] = {id, outcome} end
end

local function expire(id)
  local job = find_fields(id, OVERDUE)
  if not is_sound(id) then
    -- One that runs is its lease's; a job without a hash is no job.
    if redis.call('EXISTS', k_job(id)) == 1 and job.state ~= 'running' and not TERMINAL[job.state] then
      if job.queue then take_off_list(id, job.queue) end
      bury(id, job.queue or '', iso, now)
    end
    job = {}
  end
  local deadline = tonumber(job.deadline_ms or 0)
  local is_late = deadline > 0 and deadline <= now
  if job.state == 'queued' then
    if redis.pcall('ZREM', k_isolated(job.queue), id) ~= 1 then take_off_list(id, job.queue) end
    local code, message = 'deadline_exceeded', 'the deadline passed while the job was queued'
    if not is_late then
      code, message = 'unserved', 'no worker took the job from the queue ' .. job.queue .. ' for ' ..
        (job.queued_ttl or DEFAULT.queued_ttl) .. ' s (queued_ttl)'
    end
    finalize_unowned(id, job.queue, 'expired', code, message, iso, now)
    done[#done + 1] = {id, 'expired'}
    return
  end
  redis.call('ZREM', k_deadlines(), id)
  if job.state == 'running' and not is_late then  -- it was taken in time, and is noted anew if it comes back
    if deadline > 0 then redis.call('ZADD', k_deadlines(), int(deadline), id) end
  elseif job.state == 'running' then
    if job.cancel_reason == '' then set_fields(id, {cancel_reason = 'deadline_exceeded'}) end
    redis.call('PUBLISH', k_control(job.owner), 'cancel ' .. id)
  end
end

for queue in pairs(queues) do
  for _, id in ipairs(redis.pcall('ZRANGEBYSCORE', k_leases(queue), '-inf', now, 'LIMIT', 0, most)) do take_over(id, queue) end
end
for _, id in ipairs(redis.pcall('ZRANGEBYSCORE', k_deadlines(), '-inf', now, 'LIMIT', 0, most)) do expire(id) end

for at = FIRST_QUEUE, #ARGV do
  local held = k_isolated(ARGV[at])
  if redis.call('EXISTS', held) == 1 then
    LOSSES.see(machine, now, lease)
    for _, id in ipairs(redis.pcall('ZRANDMEMBER', held, math.min(most, JUDGED))) do judge(id, ARGV[at]) end
  end
end

-- RQ's own workers trim these; a fleet of ours alone has nobody else to. A few of others' queues a call.
local left = TRIMMED
local function trim(registry)
  local over = left > 0 and redis.call('ZCOUNT', registry, '-inf', '(' .. int(math.floor(now / 1000))) or 0
  if over > 0 then left = left - redis.call('ZREMRANGEBYRANK', registry, 0, math.min(over, left) - 1) end
end
-- A queue that has nothing more, and that no enqueue will name again, if its model was misspelt.
local function is_deserted(queue)
  if own[queue] then return false end
  local keys = {k_open(queue), k_leases(queue), k_isolated(queue), k_rq_queue(queue), k_rq_started(queue)}
  for _, registry in pairs(REGISTRIES) do keys[#keys + 1] = registry(queue) end
  return redis.call('EXISTS', unpack(keys)) == 0
end
local function tidy(queue)
  if not LANES[string.match(queue, '^.+:([^:]+)$')] then return end  -- ours are named "<model>:<lane>"
  for _, registry in pairs(REGISTRIES) do show(trim, registry(queue)) end
  if is_deserted(queue) then redis.call('SREM', k_rq_queues(), k_rq_queue(queue)) end
end
for queue in pairs(own) do tidy(queue) end
for _, name in ipairs(redis.pcall('SRANDMEMBER', k_rq_queues(), TIDIED)) do tidy(string.sub(name, head)) end
return answer({0, done})
