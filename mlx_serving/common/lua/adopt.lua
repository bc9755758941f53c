-- Writes what the payloads of jobs that RQ's own enqueue put on the list ask of the queue, and hands the jobs back, uncharged: each is
-- claimed again by its tenant's limits and turns. A worker read the payloads; a script can't, since they are compressed.
-- ARGV: two prefixes, worker, iso (the wall clock's time in RQ's form), then for each job:
--   id, epoch, nonce                  the attempt
--   max_attempts, deadline_ms (from its enqueue; 0: none), timeout_ms, abandon_ms (0: none), result_ttl (seconds), stream (0|1)
--   tenant                            '': none
--   rows                              of the batch that it takes
-- Returns for each job: {'OK'} (it waits, or was cancelled), {'FENCED'} (another attempt's), or why its tenant may not have it, as
--   `refusal_of` says: it still runs, and its worker is to end it.
local worker, iso = ARGV[3], ARGV[4]
local FIRST_JOB, ARGUMENTS = 5, 11
local READ = attempt_fields('cancel_reason', 'enqueued_ms')
local now = now_ms()
local replies = {}

local function hand_back(id, job, epoch, max_attempts, deadline_ms, timeout_ms, abandon_ms, result_ttl, stream, rows)
  local deadline = deadline_ms > 0 and int(tonumber(job.enqueued_ms) + deadline_ms) or 0
  set_fields(id, {
    max_attempts = max_attempts, deadline_ms = deadline, timeout_ms = timeout_ms, abandon_ms = abandon_ms, result_ttl = result_ttl,
    stream = stream, rows = rows > 1 and rows or nil,
  })
  redis.call('HDEL', k_job(id), F.adopted, F.started_ms)  -- it starts when it is claimed again
  requeue(id, job.queue, worker, epoch)
end

local function adopt(id, epoch, nonce, max_attempts, deadline_ms, timeout_ms, abandon_ms, result_ttl, stream, tenant, rows)
  local job = find_fields(id, READ)
  if not runs(job, worker, epoch, nonce) then
    LOSSES.forgive(id, nonce)
    return {job.state == 'queued' and is_attempt(job, epoch, nonce) and 'OK' or 'FENCED'}
  end
  if end_cancelled(id, job, iso, now) then return {'OK'} end
  local refused = tenant ~= '' and refusal_of(tenant, tonumber(rows))
  if refused then return refused end
  hand_back(id, job, epoch, max_attempts, tonumber(deadline_ms), timeout_ms, abandon_ms, result_ttl, stream, tonumber(rows))
  if tenant ~= '' then
    redis.call('HSET', k_job(id), F.tenant, tenant)
    tolerantly(tenant_waits, id, job.queue, tenant, 'RPUSH')
  end
  return {'OK'}
end

for at = FIRST_JOB, #ARGV, ARGUMENTS do replies[#replies + 1] = adopt(unpack(ARGV, at, at + ARGUMENTS - 1)) end
return answer(replies)
