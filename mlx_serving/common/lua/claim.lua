-- Takes up to `most` jobs from the queues in priority order; an id is never in neither place.
-- ARGV: P R worker iso lease_ms protocol capacity_tokens most max_payload_bytes queue …
-- Returns {suspended 0|1, {job …}, {dropped id …}}; a job is
--   {id, queue, epoch, seq, data, problem, deadline_ms, timeout_ms, stream, result_ttl, enqueued_ms, started_ms, first_token_ms, now_ms}.
local worker, iso, lease = ARGV[3], ARGV[4], tonumber(ARGV[5])
local protocol, capacity, most, max_payload = tonumber(ARGV[6]), tonumber(ARGV[7]), tonumber(ARGV[8]), tonumber(ARGV[9])
if redis.call('EXISTS', k_rq_suspended()) == 1 then return {1, {}, {}} end

local PAGE, PAGES = 64, 16  -- how far past jobs that are not for this worker it looks
local FORBIDDEN = {'success_callback_name', 'failure_callback_name', 'stopped_callback_name', 'webhooks',
                   'dependency_ids', 'dependency_id', 'repeats_left', 'rate_limit_key'}
local now = now_ms()
local jobs, dropped = {}, {}

-- Jobs put on the list by RQ's own Queue.enqueue have no control hash yet.
local function adopt(id, queue)
  redis.call('DEL', k_events(id))  -- of an earlier life: nobody knows what it belongs to
  redis.call('HSET', k_job(id), 'st', 'queued', 'q', queue, 'ep', 0, 'ow', '', 'seq', 0, 'at', 0, 'ma', 5,
    'mp', 1, 'dl', 0, 'to', 0, 'ab', 0, 'ttl', 3600, 'sm', 1, 'ca', '', 'en', int(now), 'nd', 0)
  redis.call('ZADD', k_open(queue), int(now), id)
end

local function problem_of(id)
  local key = k_rq_job(id)
  for i, value in ipairs(redis.call('HMGET', key, unpack(FORBIDDEN))) do
    if value and value ~= '' and value ~= '[]' then return 'forbidden_field:' .. FORBIDDEN[i] end
  end
  local size = redis.call('HSTRLEN', key, 'data')
  if size == 0 then return 'corrupt_job:data' end
  if size > max_payload then return 'payload_too_large:data' end
  return ''
end

local function take(id, queue)
  local key = k_job(id)
  local epoch = int(redis.call('HINCRBY', key, 'ep', 1))
  redis.call('HSET', key, 'st', 'running', 'ow', worker)
  redis.call('HSETNX', key, 'sa', int(now))
  redis.call('ZADD', k_leases(queue), int(now + lease), id)
  local problem = problem_of(id)
  show(view_start, id, queue, epoch, worker, iso, now)
  local data = problem == '' and redis.call('HGET', k_rq_job(id), 'data') or ''
  local c = redis.call('HMGET', key, 'seq', 'dl', 'to', 'sm', 'ttl', 'en', 'sa', 'ft')
  jobs[#jobs + 1] = {id, queue, epoch, c[1], data, problem, c[2], c[3], c[4], c[5], c[6], c[7], c[8] or '0', int(now)}
end

-- 'take', 'skip' (leave it for a worker that can), or 'drop' (it has no business on the list)
local function decide(id, queue)
  local kind = redis.call('TYPE', k_job(id)).ok
  if kind == 'none' then
    if not is_hash(k_rq_job(id)) then return 'drop' end
    adopt(id, queue)
  elseif not is_sound(id) then
    bury(id, queue, iso, now)
    return 'drop'
  end
  local c = redis.call('HMGET', k_job(id), 'st', 'mp', 'nd', 'dl', 'ep')
  if TERMINAL[c[1]] then
    -- A stock requeue of a job that ended: refused, and the view says again what is true.
    local ttl = math.max(redis.call('TTL', k_job(id)), 1)
    show(view_end, id, queue, c[1], iso, ttl, now, '', c[5], nil)
    return 'drop'
  end
  if c[1] ~= 'queued' then return 'drop' end
  local verdict = stock_verdict(id)
  if verdict ~= '' then
    finalize_unowned(id, queue, 'cancelled', 'cancelled', 'the RQ job was ' .. verdict, iso, now)
    return 'drop'
  end
  local deadline = tonumber(c[4])
  if deadline > 0 and deadline <= now then
    finalize_unowned(id, queue, 'expired', 'deadline_exceeded', 'the deadline passed while the job was queued', iso, now)
    return 'drop'
  end
  if tonumber(c[2]) > protocol or tonumber(c[3]) > capacity then return 'skip' end
  return 'take'
end

for i = 10, #ARGV do
  local queue, offset = ARGV[i], 0
  local list = k_rq_queue(queue)
  for _ = 1, PAGES do
    if #jobs >= most then break end
    local ids = redis.call('LRANGE', list, offset, offset + PAGE - 1)
    if #ids == 0 then break end
    for _, id in ipairs(ids) do
      if #jobs >= most then break end
      local verdict = decide(id, queue)
      if verdict == 'skip' then offset = offset + 1
      else
        redis.call('LREM', list, 1, id)
        if verdict == 'take' then take(id, queue) else dropped[#dropped + 1] = id end
      end
    end
  end
end
return {0, jobs, dropped}
