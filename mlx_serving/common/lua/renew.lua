-- Renews leases of jobs whose engine made progress, whether or not they emitted.
-- ARGV: P R worker lease_ms, then id epoch nonce a job. Returns per job {status 'OK'|'FENCED', cancel_reason}.
local worker, lease = ARGV[3], tonumber(ARGV[4])
local now = now_ms()
local replies = {}

local function renew(id, epoch, nonce)
  local c = read_fields(id, 'st', 'ep', 'ow', 'no', 'q', 'ca')
  if not runs(c, worker, epoch, nonce) then return {'FENCED', ''} end
  -- It removes nothing: a full Redis lets a script go on that has begun to write, and a renewal takes no memory.
  redis.call('ZREM', k_leases(c.q), '')
  redis.call('ZADD', k_leases(c.q), int(now + lease), id)
  if c.ca == '' then
    c.ca = stock_verdict(id)
    if c.ca ~= '' then redis.call('HSET', k_job(id), 'ca', c.ca) end
  end
  return {'OK', c.ca or ''}
end

for i = 5, #ARGV, 3 do replies[#replies + 1] = renew(ARGV[i], ARGV[i + 1], ARGV[i + 2]) end
return replies
