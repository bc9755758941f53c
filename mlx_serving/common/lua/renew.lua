-- Renews leases of jobs whose engine made progress, whether or not they emitted.
-- ARGV: two prefixes, worker, lease_ms, then id, epoch, nonce for each job.
-- Returns for each job: status (OK | FENCED), its cancel reason or ''.
local worker, lease = ARGV[3], tonumber(ARGV[4])
local FIRST_JOB, ARGUMENTS = 5, 3
local READ = attempt_fields('cancel_reason')
local now = now_ms()
local replies = {}

local function renew(id, epoch, nonce)
  local job = find_fields(id, READ)
  if not runs(job, worker, epoch, nonce) then
    LOSSES.forgive(id, nonce)
    return {'FENCED', ''}
  end
  -- It removes nothing: a full Redis lets a script go on that has begun to write, and a renewal takes no memory.
  redis.call('ZREM', k_leases(job.queue), '')
  redis.call('ZADD', k_leases(job.queue), int(now + lease), id)
  if job.cancel_reason == '' then
    job.cancel_reason = stock_verdict(id)
    if job.cancel_reason ~= '' then set_fields(id, {cancel_reason = job.cancel_reason}) end
  end
  return {'OK', job.cancel_reason or ''}
end

for at = FIRST_JOB, #ARGV, ARGUMENTS do
  local id, epoch, nonce = unpack(ARGV, at, at + ARGUMENTS - 1)
  replies[#replies + 1] = renew(id, epoch, nonce)
end
return answer(replies)
